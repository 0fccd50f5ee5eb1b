"""UPerNet on vanilla VMamba-S, 160k iterations of ADE20K: published mIoU 49.5, with test-time augmentation 50.5."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vanilla_vmamba_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
