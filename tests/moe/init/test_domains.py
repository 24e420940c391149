"""Rows from tokens of domains, against numpy and plain loops in float64."""

from __future__ import annotations

import numpy
import pytest
import torch

from sparsecraft.moe.init.domains import Means, Regression


def tokens(*counts: int, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, width, generator=generator) + e for e, count in enumerate(counts)]


@pytest.mark.parametrize("penalty", [1e-6, 0.01, 3.0])
def test_the_regression_is_the_least_squares_of_numpy(penalty):
    """The penalty is D more tokens, sqrt(penalty) e_d, that belong to no domain."""
    domains = tokens(40, 25, 7)
    found = Regression(3, penalty)
    for e, x_TD in enumerate(domains):
        found.take(x_TD, e)
    x = numpy.concatenate([*(d.double().numpy() for d in domains), penalty**0.5 * numpy.eye(6)])
    y = numpy.zeros((len(x), 3))
    start = 0
    for e, x_TD in enumerate(domains):
        y[start : start + len(x_TD), e] = 1
        start += len(x_TD)
    wanted = numpy.linalg.lstsq(x, y, rcond=None)[0].T
    numpy.testing.assert_allclose(found.rows().numpy(), wanted, rtol=1e-8, atol=1e-10)


def test_the_rows_are_the_minimum_of_a_plain_loop():
    """d/dW of sum_t |W x_t - y_t|^2 + lambda |W|^2, token by token, is zero."""
    domains = tokens(9, 5, width=4)
    found = Regression(2, 0.5)
    for e, x_TD in enumerate(domains):
        found.take(x_TD, e)
    W = found.rows()
    slope = [[2 * 0.5 * W[e, d].item() for d in range(4)] for e in range(2)]
    for domain, x_TD in enumerate(domains):
        for x in x_TD.double().tolist():
            for e in range(2):
                missing = sum(W[e, d].item() * x[d] for d in range(4)) - (e == domain)
                for d in range(4):
                    slope[e][d] += 2 * missing * x[d]
    assert max(abs(value) for row in slope for value in row) < 1e-9


def test_parts_in_any_order_give_what_all_tokens_give_at_once():
    domains = tokens(64, 48, 32)
    whole, parts = Regression(3, 0.01), Regression(3, 0.01)
    for e, x_TD in enumerate(domains):
        whole.take(x_TD, e)
    for start in range(0, 64, 8):
        for e in (2, 0, 1):
            parts.take(domains[e][start : start + 8], e)
    torch.testing.assert_close(parts.rows(), whole.rows(), rtol=1e-10, atol=1e-12)


def test_a_domain_that_comes_later_needs_no_old_token():
    domains = tokens(50, 40, 30)
    early, all_at_once = Regression(3, 0.01), Regression(3, 0.01)
    for e in (0, 1):
        early.take(domains[e], e)
    two = Regression(2, 0.01)
    for e in (0, 1):
        two.take(domains[e], e)
    assert torch.equal(early.rows()[:2], two.rows())
    assert not early.rows()[2].any()
    early.take(domains[2], 2)
    for e, x_TD in enumerate(domains):
        all_at_once.take(x_TD, e)
    assert torch.equal(early.rows(), all_at_once.rows())
    assert not torch.allclose(early.rows()[:2], two.rows())  # the old rows move, too


def test_means_are_those_of_all_tokens():
    domains = tokens(5, 3)
    found = Means(2)
    for e, x_TD in enumerate(domains):
        found.take(x_TD[:2], e)
        found.take(x_TD[2:], e)
    wanted = torch.stack([x_TD.double().mean(0) for x_TD in domains])
    torch.testing.assert_close(found.rows(), wanted)
