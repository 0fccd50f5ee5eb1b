"""UPerNet on LocalVMamba-S, 160k iterations of ADE20K: published mIoU 50.0, with test-time augmentation 51.0."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="local_vssm_small", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
