"""UPerNet on Mamba2D-S/16, 160k iterations of ADE20K: not published, the recipe of the other plain models."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="mamba2d_small_patch16_224", img_size=512, drop_path_rate=0.1),
    neck=dict(type="VisionMambaFeaturePyramid", channels=384, norm_cfg=dict(type="SyncBN")),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384),
)
without_decay = ("pos_embed", "norm", "A_log", ".D")
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={name: dict(decay_mult=0.0) for name in without_decay}))
