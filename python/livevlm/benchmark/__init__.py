# SPDX-License-Identifier: Apache-2.0
"""`livevlm bench stream`: livevlm and stock transformers side by side, over streams of growing length.

How it measures:
- The same model object for both, batch 1; random weights do, for speed does not depend on them.
- By the clock of the host, with the GPU waited for: what a user waits for, Python and launches included.
- Every kind of call is warmed before it is timed. Median, 20th and 80th percentile.
- livevlm is used as its users do: `Stream.push` of 360p frames from the host, `Stream.ask`, `Stream.watching`. Stock
  transformers is spared all of that: its pixels are ready on the device, its question is token ids.
- The language model of stock transformers runs with cuDNN attention off: with it on, cuDNN makes a plan for every new
  length of the cache, which takes three times as long as decoding a token does.
- Parts are measured in turn, each within a time limit, and written as they are done; a part that is measured again
  replaces its old rows.
"""
