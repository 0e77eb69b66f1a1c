# SPDX-License-Identifier: Apache-2.0
"""What `train.py` is made of: documents, model, head scores, exported files."""
