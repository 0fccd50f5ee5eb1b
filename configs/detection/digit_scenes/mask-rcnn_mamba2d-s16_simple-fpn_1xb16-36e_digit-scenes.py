"""Mask R-CNN on Mamba2D-S/16, from scratch on the digit scenes."""

_base_ = "../_base_/mask-rcnn_1xb16-36e_digit-scenes.py"

model = dict(
    backbone=dict(model_name="mamba2d_small_patch16_224", out_indices=[23], img_size=256),
    neck=dict(_delete_=True, type="ViTDetFeaturePyramid", in_channels=384),
)
