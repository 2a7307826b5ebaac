"""Import before torchvision: its wheel's operators do not load beside torch's CPU build. Its transforms need none."""

import torch

KEPT = torch.library.Library("torchvision", "DEF")
KEPT.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
KEPT.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
