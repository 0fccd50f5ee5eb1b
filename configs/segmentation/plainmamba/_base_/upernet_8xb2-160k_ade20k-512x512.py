"""UPerNet on PlainMamba: the auxiliary head on the last output, and what is trained without decay."""

_base_ = "../../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(auxiliary_head=dict(in_index=3))
without_decay = ("pos_embed", "norm", "bias", "A_log", ".D", "direction_B")
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={name: dict(decay_mult=0.0) for name in without_decay}))
