"""A comparison of a stream with labelled images, by what a segmentation network learns from each.

`comparison` runs it, `arms` lists what is compared, `batches` makes the labelled images of each arm, `teacher`
trains the segmentation network that labels samples in place of a person.
"""
