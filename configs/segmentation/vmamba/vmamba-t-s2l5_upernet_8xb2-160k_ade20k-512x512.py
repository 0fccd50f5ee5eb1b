"""UPerNet on VMamba-T s2l5, 160k iterations of ADE20K: published mIoU 48.3, with test-time augmentation 48.6."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
