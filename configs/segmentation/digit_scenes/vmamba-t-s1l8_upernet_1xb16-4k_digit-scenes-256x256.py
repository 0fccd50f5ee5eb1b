"""UPerNet on VMamba-T s1l8, from scratch on the digit scenes."""

_base_ = "../_base_/upernet_1xb16-4k_digit-scenes-256x256.py"

model = dict(
    backbone=dict(model_name="vmamba_tiny_s1l8"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
