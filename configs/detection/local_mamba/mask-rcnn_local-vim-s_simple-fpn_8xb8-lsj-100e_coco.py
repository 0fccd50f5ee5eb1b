"""Mask R-CNN on LocalVim-S, 100 epochs of COCO: not published."""

_base_ = "./_base_/mask-rcnn_local-vim_simple-fpn_8xb8-lsj-100e_coco.py"

model = dict(
    backbone=dict(model_name="local_vim_small_searched", out_indices=[19], feature_stream="mixer"),
    neck=dict(in_channels=384),
)
