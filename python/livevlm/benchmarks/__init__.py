# SPDX-License-Identifier: Apache-2.0
"""The field's benchmarks, run on a user's own copies; see docs/evaluation.md.

`schema` is what all formats become; `format` and the modules named after benchmarks read them; `locate` and `frames`
find and open videos; `viewer`, `watch` and `asking` show a video to streams and ask; `scoring` and `judge` decide;
`results`, `identity` and `shards` keep the answers; `summary` adds up; `run` puts it together.
"""
