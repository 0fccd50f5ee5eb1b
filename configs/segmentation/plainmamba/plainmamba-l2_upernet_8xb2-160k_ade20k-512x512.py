"""UPerNet on PlainMamba-L2, 160k iterations of ADE20K: published mIoU 46.8."""

_base_ = "./_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="plainmamba_l2", drop_path_rate=0.2),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384),
)
