import torch.nn.functional as F

from models.layers.mlp import ACTIVATIONS, Activation

ACTIVATIONS["mish"] = Activation(1, F.mish)  # arXiv 1908.08681
