"""Mask R-CNN on LocalVim-T, 100 epochs of COCO: published box AP 45.3, mask AP 39.9."""

_base_ = "./_base_/mask-rcnn_local-vim_simple-fpn_8xb8-lsj-100e_coco.py"

model = dict(
    backbone=dict(model_name="local_vim_tiny", out_indices=[19], feature_stream="mixer"),
    neck=dict(in_channels=192),
)
