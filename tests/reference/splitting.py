"""Plain-loop transcriptions of the papers that split a dense feed-forward network into experts.

Legend: N tokens, d width, f hidden neurons, E experts of m neurons each, K selected ones. A network
is a dict: "up" (f, d), "down" (d, f), "act", and where it has them "gate" (f, d), "up_bias" (f,),
"gate_bias" (f,) and "down_bias" (d,). A partition is a list of E lists of neuron numbers. Loops run
over tokens t, experts e and neurons j; nothing is vectorized but the dot product. Results keep the
dtype of their inputs.
"""

import math

import torch

from tests.reference.papers import softmax, top_k

# ------------------------------------------------------------------------------------- the network


def activation(net, x_t, j):
    """a_j = act(w_j x + b_j), or act(gate_j x) * (up_j x): what neuron j sends to `down`."""
    up = net["up"][j] @ x_t
    if "up_bias" in net:
        up = up + net["up_bias"][j]
    if "gate" not in net:
        return net["act"](up)
    gate = net["gate"][j] @ x_t
    if "gate_bias" in net:
        gate = gate + net["gate_bias"][j]
    return net["act"](gate) * up


def expert(net, partition, e, x_t):
    """E_e(x): the part of the output that the neurons of expert e write; without down's bias."""
    y = torch.zeros(len(net["down"]), dtype=x_t.dtype)
    for j in partition[e]:
        y = y + activation(net, x_t, j) * net["down"][:, j]
    return y


def split(net, partition, x, kept, weights=None, means=None):
    """sum over kept e of w_e E_e(x) + b2; where `means` (f,) stands, an expert that is not kept
    gives down's image of its neurons' means (G-MoEfication).

    kept: for each token the set of its experts; weights: for each token a dict, 1 where None.
    """
    rows = []
    for t in range(len(x)):
        y = torch.zeros(len(net["down"]), dtype=x.dtype)
        for e in range(len(partition)):
            if e in kept[t]:
                w = 1.0 if weights is None else weights[t][e]
                y = y + w * expert(net, partition, e, x[t])
            elif means is not None:
                for j in partition[e]:
                    y = y + means[j] * net["down"][:, j]
        if "down_bias" in net:
            y = y + net["down_bias"]
        rows.append(y)
    return torch.stack(rows)


def neuron_means(net, x):
    """Each neuron's mean activation over the tokens."""
    f = len(net["up"])
    return [sum(activation(net, x[t], j) for t in range(len(x))) / len(x) for j in range(f)]


# ----------------------------------------------------------------------------- what routers regress


def mass(net, partition, x):
    """MoEfication: s_e = sum of the positive activations of the expert. -> N lists of E scalars."""
    return [
        [sum(activation(net, x_t, j).clamp(min=0) for j in neurons) for neurons in partition]
        for x_t in x
    ]


def deviation(net, partition, x, means):
    """G-MoEfication with `use_abs`: s_e = sum_j |a_j - mean_j|."""
    return [
        [sum((activation(net, x_t, j) - means[j]).abs() for j in neurons) for neurons in partition]
        for x_t in x
    ]


def squared_deviation(net, partition, x, means):
    """G-MoEfication's other margin: s_e = sum_j (a_j - mean_j)^2."""
    return [
        [sum((activation(net, x_t, j) - means[j]) ** 2 for j in neurons) for neurons in partition]
        for x_t in x
    ]


def output_norm(net, partition, x):
    """D2DMoE: the L2 norm of the expert's output."""
    return [
        [math.sqrt(sum(float(v) ** 2 for v in expert(net, partition, e, x_t)))
         for e in range(len(partition))]
        for x_t in x
    ]  # fmt: skip


def hidden_norm(net, partition, x):
    """D2DMoE's other label: the L2 norm of the expert's activations."""
    return [
        [math.sqrt(sum(float(activation(net, x_t, j)) ** 2 for j in neurons))
         for neurons in partition]
        for x_t in x
    ]  # fmt: skip


def captured(scores, kept):
    """The mean over tokens of the kept experts' share of the token's total."""
    shares = [
        sum(float(s[e]) for e in chosen) / sum(float(v) for v in s)
        for s, chosen in zip(scores, kept, strict=True)
    ]
    return sum(shares) / len(shares)


# ---------------------------------------------------------------------------------------- scorers


def unit(v):
    return v / math.sqrt(sum(float(value) ** 2 for value in v))


def centers(rows, partition):
    """The mean of the members' rows, each of length one; not normalized again."""
    return torch.stack(
        [sum(unit(rows[j]) for j in neurons) / len(neurons) for neurons in partition]
    )


def similarity(x, center):
    """MoEfication's parameter center: -||x / |x| - c_e||."""
    return [[-math.sqrt(sum(float(v) ** 2 for v in unit(x_t) - c)) for c in center] for x_t in x]


def mlp(x, first, second):
    """MoEfication: W2 tanh(W1 x / |x|), no biases. first (E, d), second (E, E)."""
    rows = []
    for x_t in x:
        hidden = [torch.tanh(row @ unit(x_t)) for row in first]
        rows.append([sum(row[i] * hidden[i] for i in range(len(hidden))) for row in second])
    return rows


def norm(x, first, second):
    """D2DMoE: |W2 relu(W1 x)|, no biases. first (w, d), second (E, w)."""
    rows = []
    for x_t in x:
        hidden = [(row @ x_t).clamp(min=0) for row in first]
        rows.append([sum(row[i] * hidden[i] for i in range(len(hidden))).abs() for row in second])
    return rows


def representatives(marks, partition):
    """CMoE: in each expert, the neuron whose column of activation markers is nearest to the mean
    of the expert's columns. marks (N, f) 0/1 -> E neuron numbers; the lower one on a tie."""
    found = []
    for neurons in partition:
        columns = [marks[:, j].double() for j in neurons]
        center = sum(columns) / len(columns)
        distances = [float(((c - center) ** 2).sum()) for c in columns]
        found.append(neurons[distances.index(min(distances))])
    return found


def analytic(net, chosen, x):
    """CMoE: the representative neuron's own activation is the expert's score."""
    return [[activation(net, x_t, j) for j in chosen] for x_t in x]


# ------------------------------------------------------------------------------------------- rules


def share(scores, tau):
    """DSTI: p = r / sum r; the smallest prefix in descending order whose sum of p reaches tau;
    one expert at least."""
    total = sum(float(v) for v in scores)
    order = sorted(range(len(scores)), key=lambda e: -float(scores[e]))
    kept, reached = [], 0.0
    for e in order:
        if kept and reached >= tau:
            break
        kept.append(e)
        reached += float(scores[e]) / total
    return set(kept)


def relative(scores, tau):
    """D2DMoE: r_e >= tau * max r; tau is the paper's, one minus the code's."""
    top = max(float(v) for v in scores)
    return {e for e, v in enumerate(scores) if float(v) >= tau * top}


def threshold(scores, tau):
    """LTE: G_e > tau."""
    return {e for e, v in enumerate(scores) if float(v) > tau}


def largest(scores, k):
    """Fixed k; on a tie the lower index."""
    return set(
        top_k(
            [torch.tensor(float(v.detach()) if hasattr(v, "detach") else float(v)) for v in scores],
            k,
        )
    )


# --------------------------------------------------------------------------------------- weightings


def scaled(scores, kept, k):
    """LLaMA-MoE: the softmax over the kept scores, times E / k."""
    order = sorted(kept)
    p = softmax([scores[e] for e in order])
    return {e: p[i] * len(scores) / k for i, e in enumerate(order)}


def straight_through(scores, kept):
    """Faster MoEfication: 1 + s - stop_gradient(s), s the softmax over the kept scores."""
    order = sorted(kept)
    p = softmax([scores[e] for e in order])
    return {e: 1.0 + p[i] - p[i].detach() for i, e in enumerate(order)}


def gain(scores, kept, u):
    """CMoE: 1 + softmax(s)_e u_e, the softmax over all routed experts."""
    p = softmax(list(scores))
    return {e: 1.0 + p[e] * u[e] for e in kept}


# ------------------------------------------------------------------------------------------ losses


def efficiency(gates):
    """LTE: 1 / (L N) sum_l sum_i G_i^2, mean over tokens; i runs over the N experts of a layer.
    gates: for each of L layers, a list of tokens, each with N scores."""
    found = [[sum(float(v) ** 2 for v in g_t) / len(g_t) for g_t in g] for g in gates]
    return sum(sum(tokens) / len(tokens) for tokens in found) / len(gates)


def separability(gates, tau=0.5, epsilon=0.0):
    """LTE: 1 / (L N) sum_l sum_i 1 / (G_i - tau)^2; epsilon is ours, the paper has none."""
    found = [
        [sum(1.0 / ((float(v) - tau) ** 2 + epsilon) for v in g_t) / len(g_t) for g_t in g]
        for g in gates
    ]
    return sum(sum(tokens) / len(tokens) for tokens in found) / len(gates)


def hoyer(a):
    """D2DMoE: the mean over tokens of (sum |a|)^2 / sum a^2. a (N, f)."""
    values = [
        sum(abs(float(v)) for v in a_t) ** 2 / (sum(float(v) ** 2 for v in a_t) + 1e-15)
        for a_t in a
    ]
    return sum(values) / len(values)


def l1(a):
    """D2DMoE: the mean over tokens of sum |a|."""
    return sum(sum(abs(float(v)) for v in a_t) for a_t in a) / len(a)


def above(pre, displacement):
    """max(pre, D) - D: what the clamped losses of D2DMoE penalize, with D = -10."""
    return [[max(float(v), displacement) - displacement for v in p_t] for p_t in pre]


# ------------------------------------------------------------------------------------- parameters


def linear_router(d, E):
    """LTE: one matrix."""
    return d * E


def mlp_router(d, E):
    """MoEfication: d -> E, tanh, E -> E, no biases."""
    return d * E + E * E


def norm_router(d, w, E):
    """D2DMoE: d -> w, ReLU, w -> E, no biases."""
    return d * w + w * E


def analytic_router(d, E, gated, biased=False):
    """CMoE: a neuron for each routed expert, with all that belongs to it: of the gate too where
    there is one, and its biases (CMoE's own models have none)."""
    return E * (d + (1 if biased else 0)) * (2 if gated else 1)


def sigmoid_router(d, E):
    """LTE's matrix, and the bias of ours that starts it nearly dense."""
    return linear_router(d, E) + E


def flops_ratio(d, f, E, k, gated, router):
    """((multiplications of the router) + k m (2 or 3) d) / ((2 or 3) d f)."""
    matrices = 3 if gated else 2
    return (router + k * (f / E) * matrices * d) / (matrices * d * f)
