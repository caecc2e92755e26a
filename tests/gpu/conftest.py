"""Set before CUDA starts: cuBLAS repeats its bits only with a workspace of its own."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
