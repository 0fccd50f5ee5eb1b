"""UPerNet on vanilla VMamba-B, 160k iterations of ADE20K: published mIoU 50.0, with test-time augmentation 51.3."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vanilla_vmamba_base", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
