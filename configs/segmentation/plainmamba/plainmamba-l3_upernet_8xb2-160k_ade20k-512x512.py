"""UPerNet on PlainMamba-L3, 160k iterations of ADE20K: published mIoU 49.1."""

_base_ = "./_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="plainmamba_l3", drop_path_rate=0.3),
    decode_head=dict(in_channels=[448] * 4),
    auxiliary_head=dict(in_channels=448),
)
