"""UPerNet on VMamba-T s1l8, 160k iterations of ADE20K: published mIoU 47.9, with test-time augmentation 48.8."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
