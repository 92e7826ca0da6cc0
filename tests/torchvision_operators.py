"""A pytest plugin for processes that have torchvision's Python code beside a torch that its binary was not built for.

Importing it wants to describe two operators that its binary would have brought. Resizing and the like, which is all that
transformers asks of it, are torch's own.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
