"""Mask R-CNN on Mamba2D-S/16, 100 epochs of COCO: not published, the recipe of LocalVim."""

_base_ = "../_base_/mask-rcnn_simple-fpn_8xb8-lsj-100e_coco.py"

model = dict(
    backbone=dict(model_name="mamba2d_small_patch16_224", out_indices=[23]),
    neck=dict(in_channels=384),
)
without_decay = ("pos_embed", "norm", "A_log", ".D")
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={name: dict(decay_mult=0.0) for name in without_decay}),
    clip_grad=dict(max_norm=35, norm_type=2),
)
