"""One thread for the tensors of tests: they are small, and on a busy machine threads wait for each other."""

import torch

torch.set_num_threads(1)
