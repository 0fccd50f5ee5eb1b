"""UPerNet on LocalVMamba-T, 160k iterations of ADE20K: published mIoU 47.9, with test-time augmentation 49.1."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="local_vssm_tiny", drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
