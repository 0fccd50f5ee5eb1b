"""Mask R-CNN on Vim-T, from scratch on the digit scenes."""

_base_ = "../_base_/mask-rcnn_1xb16-36e_digit-scenes.py"

model = dict(
    backbone=dict(model_name="vim_tiny_patch16_224", out_indices=[23], img_size=256, class_token="", global_pool="avg"),
    neck=dict(_delete_=True, type="ViTDetFeaturePyramid", in_channels=192),
)
