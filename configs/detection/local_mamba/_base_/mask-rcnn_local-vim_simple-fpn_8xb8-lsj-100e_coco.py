"""Mask R-CNN on LocalVim: the authors' learning rates.

Their decay by layers reaches the embeddings only: it looks for blocks under another name.
"""

_base_ = "../../_base_/mask-rcnn_simple-fpn_8xb8-lsj-100e_coco.py"

embeddings = dict(lr_mult=0.7**13)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(patch_embed=embeddings, pos_embed=dict(decay_mult=0.0, **embeddings))),
    clip_grad=dict(max_norm=35, norm_type=2),
)
