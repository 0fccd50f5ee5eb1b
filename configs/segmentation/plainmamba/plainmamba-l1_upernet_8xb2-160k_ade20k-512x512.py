"""UPerNet on PlainMamba-L1, 160k iterations of ADE20K: published mIoU 44.1."""

_base_ = "./_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="plainmamba_l1", drop_path_rate=0.1),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
)
