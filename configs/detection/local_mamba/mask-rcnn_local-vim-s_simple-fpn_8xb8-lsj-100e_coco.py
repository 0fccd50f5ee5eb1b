"""Mask R-CNN on LocalVim-S, 100 epochs of COCO: not published."""

_base_ = "../_base_/mask-rcnn_simple-fpn_8xb8-lsj-100e_coco.py"

model = dict(
    backbone=dict(model_name="local_vim_small_searched", out_indices=[19], feature_stream="mixer"),
    neck=dict(in_channels=384),
)

# The authors' decay by layers reaches the embeddings only: it looks for blocks under another name.
embeddings = dict(lr_mult=0.7**13)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(custom_keys=dict(patch_embed=embeddings, pos_embed=dict(decay_mult=0.0, **embeddings))),
    clip_grad=dict(max_norm=35, norm_type=2),
)
