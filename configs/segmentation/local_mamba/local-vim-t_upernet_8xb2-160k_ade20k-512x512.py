"""UPerNet on LocalVim-T, 160k iterations of ADE20K: published mIoU 43.4, with test-time augmentation 44.4."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="local_vim_tiny", drop_path_rate=0.1, feature_stream="mixer", img_size=512),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
)
