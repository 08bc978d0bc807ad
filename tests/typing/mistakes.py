"""Mistakes that a type checker finds: exactly one in each line that ends with `# wrong`."""

from handsoff_stream import HandsOffStream, load_checkpoint, mix

HandsOffStream("faces", filter="roling")  # wrong
HandsOffStream("faces", noise="constant")  # wrong
HandsOffStream("faces", score="top10")  # wrong
HandsOffStream("faces", precision="float16")  # wrong
HandsOffStream("faces", kernel="cuda")  # wrong
HandsOffStream("faces", batch_size="8")  # wrong
HandsOffStream("faces").accepted.upper()  # wrong
load_checkpoint(8)  # wrong
mix("faces", [])  # wrong
