"""Cascade Mask R-CNN on Vim-T, 100 epochs of COCO: published box AP 45.7, mask AP 39.2."""

_base_ = "../_base_/cascade-mask-rcnn_simple-fpn_8xb8-lsj-100e_coco.py"

model = dict(
    backbone=dict(
        model_name="vim_tiny_patch16_224", out_indices=[23], rope="stream", class_token="", global_pool="avg"
    ),
    neck=dict(in_channels=192),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.837))
