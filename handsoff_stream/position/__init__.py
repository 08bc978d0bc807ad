"""Where a stream is on the index line, and how that is saved, merged and continued.

`walk` is one pass of one shard, `dealing` how much each shard hands out, `epochs` and `passing` which pass comes next,
`state` what a saved position is, and `resuming` the part of `HandsOffStream` that offers all of this.
"""
