"""Cascade Mask R-CNN on Vim-S, 100 epochs of COCO: not published."""

_base_ = "../_base_/cascade-mask-rcnn_simple-fpn_8xb8-lsj-100e_coco.py"

model = dict(
    backbone=dict(model_name="vim_small_patch16_224", out_indices=[23], rope="stream"),
    neck=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.837))
