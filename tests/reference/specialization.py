"""Krishnamurthy et al. 2023 and the importance loss of Shazeer et al. 2017, as plain loops over
Python numbers: x over samples, e over experts. Nothing here is of torch but what is read."""

import math


def probabilities(scores):
    """Softmax of a list of numbers."""
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def distances(samples):
    """Euclidean distances of all pairs, divided by the largest."""
    table = [
        [math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True))) for other in samples]
        for one in samples
    ]
    largest = max(max(row) for row in table)
    return [[value / largest for value in row] for row in table]


def importance(scores):
    """CV^2 of Importance(X) = sum over x of G(x)."""
    experts = range(len(scores[0]))
    totals = [sum(probabilities(row)[e] for row in scores) for e in experts]
    mean = sum(totals) / len(totals)
    variance = sum((total - mean) ** 2 for total in totals) / len(totals)
    return variance / mean**2


def similarity_sums(scores, samples):
    """The two sums of L_s over all x, x': of one expert / E, of two experts / (E^2 - E)."""
    p, D = [probabilities(row) for row in scores], distances(samples)
    N, E = len(scores), len(scores[0])
    same = different = 0.0
    for x in range(N):
        for y in range(N):
            for e in range(E):
                same += p[x][e] * p[y][e] * D[x][y] / E
                for other in range(E):
                    if other != e:
                        different += p[x][e] * p[y][other] * D[x][y] / (E**2 - E)
    return same, different


def attention(token, outputs, query, key):
    """The logits Q . K_i / sqrt(H) of one token."""
    dim = len(query)
    q = [sum(query[h][d] * token[d] for d in range(len(token))) for h in range(dim)]
    logits = []
    for output in outputs:
        k = [sum(key[h][o] * output[o] for o in range(len(output))) for h in range(dim)]
        logits.append(sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(dim))
    return logits


def entropy(shares):
    """In bits."""
    return -sum(share * math.log2(share) for share in shares if share > 0)
