# SPDX-License-Identifier: MIT
"""What `train.py` is made of: documents, model, head scores, exported files."""
