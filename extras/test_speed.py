"""What makes it fast: the same numbers, by another road."""

import unittest.mock

import torch
import torch.nn.attention
import torch.nn.functional as F

import motionstream
from motionstream import attend


def test_attention_asks_cudnn_first_and_forbids_nothing():
    """That a GPU's kernel is cuDNN's, only a GPU can say."""
    orders = []

    def note(*args):
        orders.append(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        return args[0]

    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    with unittest.mock.patch.object(F, "scaled_dot_product_attention", note):
        attend(*torch.randn(3, 1, 6, 2, 8))
    assert orders == [motionstream.ATTENTION]
    assert orders[0][0] == torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    assert set(before) <= set(orders[0])
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_attention_on_a_cpu_is_what_it_was_to_the_bit():
    q = torch.randn(2, 6, 3, 8)                                         # (B, L, heads, K)
    k, v = torch.randn(2, 2, 11, 3, 8)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(attend(q, k, v), expected.transpose(1, 2).flatten(2))
