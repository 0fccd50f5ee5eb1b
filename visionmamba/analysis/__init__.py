"""What models cost, and pictures of what they do."""

from .flops import count_flops, flops_by_operator, register_flop_handlers

__all__ = ["count_flops", "flops_by_operator", "register_flop_handlers"]
