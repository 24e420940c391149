"""Plain-loop transcriptions of the papers' equations.

Legend: N (or T) tokens, d hidden width, h adapter width, E experts, k active experts, r LoRA rank.
Every loop index is the paper's: t over tokens, i over experts, j over what is left. Nothing is
vectorized but the matrix-vector product `W @ v`. Results keep the dtype of their inputs, except
the losses and statistics, which are float64.
"""

import copy
import math

import torch


def gelu(v):
    """Exact GELU (Hendrycks & Gimpel, 2016): v * Phi(v), not the tanh approximation."""
    return v * 0.5 * (1.0 + torch.erf(v / math.sqrt(2.0)))


def softmax(values):
    """Softmax of a list of scalars, as a list."""
    top = max(value.detach() for value in values)  # a shift changes nothing but overflow
    exponentials = [torch.exp(value - top) for value in values]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]


def top_k(values, k):
    """The indices of the k largest scalars, largest first; on a tie the lower index wins."""
    if not 1 <= k <= len(values):
        raise ValueError(f"k must lie in 1..{len(values)} (the number of experts), got {k}")
    return sorted(range(len(values)), key=lambda i: -float(values[i].detach()))[:k]


def kept_tokens(logits, mask):
    """The token indices a statistic runs over: those whose mask is true, or all of them."""
    tokens = [t for t in range(len(logits)) if mask is None or bool(mask[t])]
    if not tokens:
        raise ValueError("no token is left after masking, so the mean over tokens is undefined")
    return tokens


# ---------------------------------------------------------------------------------------- layers


def _pesc_token(u, expert_ids, weights, down, up, scale):
    """y = sum_{i in T} w_i (u + A_i(u)), A_i(u) = scale * up_i gelu(down_i u) (PESC Eqs. 7-8)."""
    y = torch.zeros_like(u)
    for i, w in zip(expert_ids, weights, strict=True):
        adapter = scale * (up[i] @ gelu(down[i] @ u))
        y = y + w * (u + adapter)
    return y


def pesc_layer(x, base, router_weight, down, up, k, scale=1.0):
    """PESC (Wu et al., EMNLP 2024), Eqs. 7-9, without dropout.

    Eq. 7: the experts are adapters on one shared FFN, A_i(F(x)); the router reads x.
    Eq. 8: A_i(u) = sigma(u W_down) W_up + u, sigma the exact GELU.
    Eq. 9: weights = softmax(KeepTopK(W_r x, k)): top-k first, softmax over what is kept.
    `scale` is the released code's `moe_scaling`; the paper has none, that is 1.
    x (N, d); base: FFN on (1, d); router_weight (E, d); down (E, h, d); up (E, d, h) -> (N, d).
    """
    rows = []
    for t in range(len(x)):
        u = base(x[t : t + 1])[0]
        z = [router_weight[i] @ x[t] for i in range(len(router_weight))]
        T = top_k(z, k)
        w = softmax([z[i] for i in T])
        rows.append(_pesc_token(u, T, w, down, up, scale))
    return torch.stack(rows)


def pesc_layer_softmax_first(x, base, router_weight, down, up, k, scale=1.0):
    """`pesc_layer` with Eq. 9 in its other form: softmax over all E, top-k, renormalize to sum 1.

    exp(z_i) / sum_all divided by sum_T exp(z_j) / sum_all is exp(z_i) / sum_T: the same weights.
    """
    rows = []
    for t in range(len(x)):
        u = base(x[t : t + 1])[0]
        p = softmax([router_weight[i] @ x[t] for i in range(len(router_weight))])
        T = top_k(p, k)
        kept = sum(p[i] for i in T)
        w = [p[i] / kept for i in T]
        rows.append(_pesc_token(u, T, w, down, up, scale))
    return torch.stack(rows)


def upcycled_layer(x, ffn, router_weight, num_experts, k, renormalize):
    """Sparse Upcycling (Komatsuzaki et al., ICLR 2023): every expert starts as a copy of the FFN.

    p = softmax(W_r x) over all E experts, T the top-k, y = sum_{i in T} w_i FFN_i(x) with w = p, or
    p / sum_T p when `renormalize`. Renormalized it is the dense FFN for any router and k; otherwise
    it is the dense FFN shrunk by sum_T p. The copies are real ones: gradients reach x and the
    router, and do not reach the parameters of `ffn` when it is a module. No expert capacity.
    x (N, d); ffn: FFN on (1, d); router_weight (E, d) -> (N, d).
    """
    if len(router_weight) != num_experts:
        raise ValueError(f"the router scores {len(router_weight)} experts, not {num_experts}")
    experts = [copy.deepcopy(ffn) for _ in range(num_experts)]
    rows = []
    for t in range(len(x)):
        p = softmax([router_weight[i] @ x[t] for i in range(num_experts)])
        T = top_k(p, k)
        kept = sum(p[i] for i in T)
        y = 0.0
        for i in T:
            w = p[i] / kept if renormalize else p[i]
            y = y + w * experts[i](x[t : t + 1])[0]
        rows.append(y)
    return torch.stack(rows)


def lora_linear(x, weight, bias, a, b, alpha):
    """LoRA (Hu et al., 2021), Eq. 3 with its alpha / r: y = W0 x + b0 + (alpha / r) B A x.

    x (N, in); weight (out, in); bias (out,) or None; a (r, in); b (out, r) -> (N, out).
    """
    r = len(a)
    rows = []
    for t in range(len(x)):
        y = weight @ x[t]
        if bias is not None:
            y = y + bias
        for j in range(r):
            y = y + (alpha / r) * b[:, j] * (a[j] @ x[t])
        rows.append(y)
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------- losses


def switch_balance(logits, k, mask=None, normalize_by_topk=True):
    """The balance loss of one layer without its coefficient: PESC Eq. 10, Switch Eqs. 4-6.

    E * sum_i f_i p_i (Eq. 4), f_i the fraction of tokens dispatched to expert i (Eq. 5), p_i the
    mean over tokens of the full softmax (Eq. 6). A token goes to k experts, so sum_i f_i = k;
    `normalize_by_topk` divides f by k: 1 when balanced whatever k, E/k when collapsed. Without it
    (the convention of Mixtral in transformers) they are k and E.
    logits (T, E); mask (T,), true for the tokens that count -> float64 scalar.
    """
    logits = logits.double()
    E = logits.shape[1]
    tokens = kept_tokens(logits, mask)
    count = [0] * E
    probability = [logits.new_zeros(()) for _ in range(E)]
    for t in tokens:
        z = [logits[t, i] for i in range(E)]
        for i in top_k(z, k):
            count[i] += 1
        for i, p in enumerate(softmax(z)):
            probability[i] = probability[i] + p
    loss = 0.0
    for i in range(E):
        f_i = count[i] / len(tokens)
        if normalize_by_topk:
            f_i = f_i / k
        p_i = probability[i] / len(tokens)
        loss = loss + f_i * p_i
    return E * loss


def _concatenated(list_of_logits_per_layer):
    """All layers' tokens in one list of lists of E scalars, and E."""
    E = list_of_logits_per_layer[0].shape[1]
    tokens = []
    for logits in list_of_logits_per_layer:
        for t in range(len(logits)):
            tokens.append([logits[t, i].double() for i in range(E)])
    return tokens, E


def pesc_released_balance(list_of_logits_per_layer, k):
    """PESC's released balance loss as the notes describe it: always E, with zero gradient.

    A transcription of a described behavior (pesc_mov.md, finding 1), not of an equation: layers are
    concatenated first, padding counts, and the "router probability" is the mean over k of a softmax
    over only the k kept logits, which is 1/k for every token. f_i is the fraction of tokens that
    have expert i among their k, so sum_i f_i = k, and E^2 * mean_{t,i} f_i / k = E.

    This is what the released function returns for logits of the shape its docstring names,
    (batch = 1, tokens, E). The released model passes it (tokens, E): see the next function.
    list of (T, E) -> float64 scalar.
    """
    tokens, E = _concatenated(list_of_logits_per_layer)
    f = [0.0] * E
    mean_weight = []
    for z in tokens:
        T = top_k(z, k)
        mean_weight.append(sum(softmax([z[i] for i in T])) / k)  # 1/k, whatever z
        for i in T:
            f[i] += 1 / len(tokens)
    total = 0.0
    for t in range(len(tokens)):
        for i in range(E):
            total = total + f[i] * mean_weight[t]
    return E**2 * total / (len(tokens) * E)


def pesc_released_balance_as_called(list_of_logits_per_layer, k):
    """The same released function on the (tokens, E) logits that the released model gives it: E/k.

    Read in wuhy68/Parameter-Efficient-MoE 5e9b10b, camelidae/modeling_camelidae.py: the gate
    flattens its input, so the logits are 2-D; the function then inserts an axis, its max over slots
    touches only that axis, and its "mean over tokens" averages over the k slots of one token. Hence
    f_{t,i} = 1[i in T_t] / k per token, and E^2 * mean_{t,i} f_{t,i} / k = E/k (4 for E=8, k=2).
    Constant and without gradient all the same.
    list of (T, E) -> float64 scalar.
    """
    tokens, E = _concatenated(list_of_logits_per_layer)
    total = 0.0
    for z in tokens:
        T = top_k(z, k)
        mean_weight = sum(softmax([z[i] for i in T])) / k  # 1/k, whatever z
        for i in range(E):
            f_ti = 1 / k if i in T else 0.0
            total = total + f_ti * mean_weight
    return E**2 * total / (len(tokens) * E)


def z_loss(logits, mask=None):
    """ST-MoE (Zoph et al., 2022), Eq. 5: mean over tokens of (log sum_i exp z_i)^2.

    The equation number is recalled, not read. logits (T, E); mask (T,) -> float64 scalar.
    """
    logits = logits.double()
    tokens = kept_tokens(logits, mask)
    total = 0.0
    for t in tokens:
        z = [logits[t, i] for i in range(logits.shape[1])]
        top = max(value.detach() for value in z)  # log sum exp z = top + log sum exp(z - top)
        total = total + (top + torch.log(sum(torch.exp(value - top) for value in z))) ** 2
    return total / len(tokens)


# ------------------------------------------------------------------------------------ parameters


def camelidae_parameters(layers, d, h, num_experts):
    """PESC adapters and routers: L * E * (2dh + d), no biases (pesc_mov.md, 1.6)."""
    adapter = d * h + h * d
    router_row = d
    return layers * num_experts * (adapter + router_row)


def lora_parameters(layers, d, d_q, d_kv, d_ff, r):
    """LoRA on q, k, v, o, gate, up and down: r * (in + out) for each Linear (pesc_mov.md, 1.6).

    L * r * [2(d + d_q) + 2(d + d_kv) + 3(d + d_ff)].
    """
    query_and_output = 2 * (d + d_q)
    key_and_value = 2 * (d + d_kv)
    gate_up_and_down = 3 * (d + d_ff)
    return layers * r * (query_and_output + key_and_value + gate_up_and_down)


# ------------------------------------------------------------------------------------ statistics


def load_entropy(counts):
    """Normalized entropy of the experts' load: -sum_i q_i log q_i / log E, in [0, 1].

    1 is balanced and 0 is one expert taking everything. E = 1 is balanced by convention.
    counts (E,): tokens (or weight) per expert -> float.
    """
    counts = [float(count) for count in counts]
    if sum(counts) <= 0:
        raise ValueError("no token was counted, so the load has no entropy")
    if len(counts) == 1:
        return 1.0
    entropy = 0.0
    for count in counts:
        q = count / sum(counts)
        if q > 0:  # 0 log 0 = 0
            entropy -= q * math.log(q)
    return entropy / math.log(len(counts))


def mutual_information(counts_by_domain):
    """I(expert; domain) in bits under a uniform prior over domains, at most log2 D.

    Rows are normalized to p(i|m) first, so a domain's size does not matter:
    I = sum_m 1/D sum_i p(i|m) log2(p(i|m) / p(i)), p(i) = sum_m p(i|m) / D (first_experiment.md).
    counts_by_domain (D, E) -> float.
    """
    conditional = []
    for row in counts_by_domain:
        row = [float(count) for count in row]
        if sum(row) <= 0:
            raise ValueError("a domain without tokens has no distribution over experts")
        conditional.append([count / sum(row) for count in row])
    D, E = len(conditional), len(conditional[0])
    information = 0.0
    for i in range(E):
        p_i = sum(conditional[m][i] for m in range(D)) / D
        for m in range(D):
            if conditional[m][i] > 0:  # 0 log 0 = 0
                information += conditional[m][i] / D * math.log2(conditional[m][i] / p_i)
    return information
