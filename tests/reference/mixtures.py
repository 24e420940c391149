"""Plain-loop transcriptions of the mixtures of vectors and of low-rank updates.

Legend: N tokens, E experts, k active experts, r LoRA rank, H heads of c features each.
Loops run over tokens t, heads h and experts e; nothing is vectorized but `W @ v`. A linear layer
is weight (out, in) and bias (out,) or None. Results keep the dtype of their inputs.
"""

import torch

from tests.reference.papers import softmax, top_k


def linear(x_t, weight, bias):
    y = weight @ x_t
    return y if bias is None else y + bias


def weights(router, x_t, k=None, renormalize=True):
    """One weight per expert, 0 for a dropped one: p = softmax(W_r x) over all E experts.

    k None keeps every expert (soft merging). Otherwise the k largest p are kept, and divided by
    their sum when `renormalize`. router (E, in); x_t (in,) -> list of E scalars.
    """
    p = softmax([router[e] @ x_t for e in range(len(router))])
    if k is None:
        return p
    kept = top_k(p, k)
    total = sum(p[e] for e in kept) if renormalize else 1.0
    return [p[e] / total if e in kept else 0.0 * p[e] for e in range(len(p))]


# --------------------------------------------------------------------------------------- vectors


def ia3(u, vector):
    """(IA)3 (Liu et al., 2022): l * u, u the projected keys, the projected values, or the
    activation that enters the feed-forward network's last matrix.

    u (N, out); vector (out,) -> (N, out).
    """
    return torch.stack([vector * u[t] for t in range(len(u))])


def mov(u, router_input, router, vectors, k=None, renormalize=True):
    """MoV (Zadouri et al., ICLR 2024): the experts' vectors are averaged, then applied once.

    l_t = sum_e p_e l_e and y_t = l_t * u_t, p the router's weights for the token t.
    u (N, out); router_input (N, in); router (E, in); vectors (E, out) -> (N, out).
    """
    rows = []
    for t in range(len(u)):
        p = weights(router, router_input[t], k, renormalize)
        mixed = sum(p[e] * vectors[e] for e in range(len(vectors)))
        rows.append(mixed * u[t])
    return torch.stack(rows)


def mov_outputs(u, router_input, router, vectors, k=None, renormalize=True):
    """`mov` with the outputs averaged in place of the vectors: y_t = sum_e p_e (l_e * u_t)."""
    rows = []
    for t in range(len(u)):
        p = weights(router, router_input[t], k, renormalize)
        rows.append(sum(p[e] * (vectors[e] * u[t]) for e in range(len(vectors))))
    return torch.stack(rows)


def mov_released_heads(u, router, vectors, k=None):
    """The released MoV on projected keys or values, before any rotation: each head is routed alone.

    All heads share the router and each has vectors of its own. The kept weights are not
    renormalized. u (N, H * c); router (E, c); vectors (E, H, c) -> (N, H * c).
    """
    E, H, c = vectors.shape
    rows = []
    for t in range(len(u)):
        heads = []
        for h in range(H):
            head = u[t, h * c : (h + 1) * c]
            p = weights(router, head, k, renormalize=False)
            heads.append(sum(p[e] * vectors[e, h] for e in range(E)) * head)
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def mov_released_ffn(activated, linear_branch, router, vectors, k=None):
    """The released MoV in a feed-forward network: the input of its last matrix.

    a = act(W_gate x) is both what is scaled and what the router reads; then the other branch
    multiplies it (None without a gate). The kept weights are not renormalized.
    activated (N, f); linear_branch (N, f) or None; router (E, f); vectors (E, f) -> (N, f).
    """
    rows = []
    for t in range(len(activated)):
        a = activated[t]
        p = weights(router, a, k, renormalize=False)
        a = a * sum(p[e] * vectors[e] for e in range(len(vectors)))
        rows.append(a if linear_branch is None else a * linear_branch[t])
    return torch.stack(rows)


# ------------------------------------------------------------------------------- low-rank updates


def lora(x, weight, bias, a, b, alpha):
    """LoRA (Hu et al., 2021): W0 x + b0 + (alpha / r) B A x; `papers.lora_linear` by matrices.

    x (N, in); a (r, in); b (out, r) -> (N, out).
    """
    r = len(a)
    return torch.stack([linear(x_t, weight, bias) + (alpha / r) * (b @ (a @ x_t)) for x_t in x])


def molora(x, weight, bias, router, a, b, alpha, k=None, renormalize=True):
    """MoLORA (Zadouri et al., ICLR 2024): W0 x + (alpha / r) sum_e p_e (x A_e) B_e.

    Each linear layer has a router, which reads that layer's own input.
    x (N, in); router (E, in); a (E, r, in); b (E, out, r) -> (N, out).
    """
    E, r = a.shape[:2]
    rows = []
    for t in range(len(x)):
        p = weights(router, x[t], k, renormalize)
        update = sum(p[e] * (b[e] @ (a[e] @ x[t])) for e in range(E))
        rows.append(linear(x[t], weight, bias) + (alpha / r) * update)
    return torch.stack(rows)


def molora_concatenated(x, weight, bias, router, a, b, alpha):
    """`molora` as one LoRA of rank E * r whose bottleneck is multiplied by the weights."""
    E, r = a.shape[:2]
    all_a, all_b = torch.cat(list(a)), torch.cat(list(b), dim=1)
    rows = []
    for t in range(len(x)):
        p = weights(router, x[t])
        gates = torch.stack([p[e] for e in range(E) for _ in range(r)])
        update = all_b @ (gates * (all_a @ x[t]))
        rows.append(linear(x[t], weight, bias) + (alpha / r) * update)
    return torch.stack(rows)


def hydralora(x, weight, bias, router, a, b, alpha):
    """HydraLoRA (Tian et al., 2024): one A for all experts, a B each, soft routing.

    y = W0 x + (alpha / r) sum_e p_e B_e (A x). router (E, in); a (r, in); b (E, out, r).
    """
    r = len(a)
    rows = []
    for t in range(len(x)):
        p = weights(router, x[t])
        low = a @ x[t]
        update = sum(p[e] * (b[e] @ low) for e in range(len(b)))
        rows.append(linear(x[t], weight, bias) + (alpha / r) * update)
    return torch.stack(rows)


def mixlora(x, act, parts, router, loras, alpha, k):
    """MixLoRA (Li et al., 2024): expert e is the frozen network with LoRA e on each matrix.

    y = sum over the k kept experts of w_e W_down_e( act(W_gate_e x) * (W_up_e x) ), with
    w the renormalized top k of softmax(W_r x) and W_e v = W v + (alpha / r) B_e A_e v.
    Without a gate it is W_down_e act(W_up_e x).
    parts: "gate" (optional), "up", "down" -> (weight, bias); loras: the same -> (a, b) of shapes
    (E, r, in), (E, out, r); x (N, d); router (E, d) -> (N, d).
    """

    def project(name, e, v):
        a, b = loras[name]
        return linear(v, *parts[name]) + (alpha / len(a[e])) * (b[e] @ (a[e] @ v))

    rows = []
    for t in range(len(x)):
        w = weights(router, x[t], k, renormalize=True)
        y = 0.0
        for e in top_k(w, k):
            up = project("up", e, x[t])
            hidden = act(project("gate", e, x[t])) * up if "gate" in parts else act(up)
            y = y + w[e] * project("down", e, hidden)
        rows.append(y)
    return torch.stack(rows)


def smola(x, weight, bias, router, a, b, scale=1.0):
    """SMoLA (Wu et al., CVPR 2024), by token: W x + sum_e p_e B_e A_e x, soft.

    The causal variant: `smola_slots` mixes tokens.
    x (N, in); router (E, in); a (E, r, in); b (E, out, r) -> (N, out).
    """
    rows = []
    for t in range(len(x)):
        p = weights(router, x[t])
        update = sum(p[e] * (b[e] @ (a[e] @ x[t])) for e in range(len(a)))
        rows.append(linear(x[t], weight, bias) + scale * update)
    return torch.stack(rows)


def smola_slots(x, weight, bias, router, a, b, scale=1.0):
    """SMoLA with Soft MoE's dispatch and combine, one slot for each expert; x is one sequence.

    L = X Phi; expert e reads sum_t D_te x_t, D = softmax of L over tokens, and its output reaches
    token t with weight C_te, C = softmax of L over slots.
    """
    N, E = len(x), len(a)
    logits = [[router[e] @ x[t] for e in range(E)] for t in range(N)]
    outputs = []
    for e in range(E):
        dispatch = softmax([logits[t][e] for t in range(N)])
        outputs.append(b[e] @ (a[e] @ sum(dispatch[t] * x[t] for t in range(N))))
    rows = []
    for t in range(N):
        combine = softmax(logits[t])
        update = sum(combine[e] * outputs[e] for e in range(E))
        rows.append(linear(x[t], weight, bias) + scale * update)
    return torch.stack(rows)


def omni_smola(x, kinds, weight, bias, sets, scale=1.0):
    """Omni-SMoLA by token: W x, plus the set of all tokens, plus the set of the token's modality.

    sets: "all" and each modality -> (router, a, b); kinds: the modality of each of the N tokens, or
    None for a token of no modality, which only the set of all tokens serves.
    """
    rows = []
    for t in range(len(x)):
        y = linear(x[t], weight, bias)
        for name in ("all", kinds[t]):
            if name is None:
                continue
            router, a, b = sets[name]
            p = weights(router, x[t])
            y = y + scale * sum(p[e] * (b[e] @ (a[e] @ x[t])) for e in range(len(a)))
        rows.append(y)
    return torch.stack(rows)


# ------------------------------------------------------------------------------------- parameters
# The released code adapts T5: `encoder` and `decoder` layers, d width, H heads of c features, f
# hidden width. A decoder layer has two attentions; every layer has one feed-forward network.


def t5_sites(encoder, decoder):
    """(attentions, feed-forward networks)."""
    return encoder + 2 * decoder, encoder + decoder


def ia3_t5(encoder, decoder, d, H, c, f):
    """A vector for the keys, one for the values, one for the activation."""
    attentions, ffns = t5_sites(encoder, decoder)
    return attentions * 2 * H * c + ffns * f


def mov_t5(encoder, decoder, d, H, c, f, E):
    """Keys and values: E vectors and a router on one head, each. FFN: E vectors, a router on f."""
    attentions, ffns = t5_sites(encoder, decoder)
    return attentions * 2 * E * (H * c + c) + ffns * 2 * E * f


def lora_t5(encoder, decoder, d, H, c, f, r):
    """q, k, v, o, the gate's (or only) input matrix, the output matrix; not the linear branch."""
    attentions, ffns = t5_sites(encoder, decoder)
    return attentions * r * 4 * (d + H * c) + ffns * r * 2 * (d + f)


def molora_t5(encoder, decoder, d, H, c, f, E, r):
    """E LoRAs and a router at each of LoRA's sites; that of o reads H * c features, which is d."""
    attentions, ffns = t5_sites(encoder, decoder)
    routers = attentions * E * (3 * d + H * c) + ffns * E * (d + f)
    return E * lora_t5(encoder, decoder, d, H, c, f, r) + routers


# By token, on any list of linear layers (in, out).


def ia3_count(linears):
    return sum(o for _, o in linears)


def mov_count(linears, E):
    """(features the router reads, features that are scaled)."""
    return sum(E * i + E * o for i, o in linears)


def lora_count(linears, r):
    return sum(r * (i + o) for i, o in linears)


def molora_count(linears, E, r):
    """Of SMoLA's sets too, one at a time."""
    return sum(E * r * (i + o) + E * i for i, o in linears)


def hydralora_count(linears, E, r):
    return sum(r * i + E * r * o + E * i for i, o in linears)


def mixlora_count(networks, d, E, r):
    """networks: for each feed-forward network, its linear layers; one router on d for each."""
    return sum(E * lora_count(linears, r) + E * d for linears in networks)
