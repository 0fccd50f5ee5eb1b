"""UPerNet on EfficientVMamba-T, 160k iterations of ADE20K: published mIoU 38.9, with test-time augmentation 39.3."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_tiny", drop_path_rate=0.2),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
