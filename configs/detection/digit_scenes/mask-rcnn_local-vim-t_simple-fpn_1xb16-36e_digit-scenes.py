"""Mask R-CNN on LocalVim-T, from scratch on the digit scenes."""

_base_ = "../_base_/mask-rcnn_1xb16-36e_digit-scenes.py"

model = dict(
    backbone=dict(model_name="local_vim_tiny", out_indices=[19], img_size=256),
    neck=dict(_delete_=True, type="ViTDetFeaturePyramid", in_channels=192),
)
