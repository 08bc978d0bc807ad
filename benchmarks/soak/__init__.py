"""A long run: every sample once and in order, and memory that does not grow.

    python -m benchmarks.soak rate --minutes 60
    python -m benchmarks.soak failures --samples 100000

`rate` streams at the machine's full speed. Each index has to be handed out once or dropped by the filter, in order.
`failures` trains on nothing, but fails as a training run can: a transform raises, a DataLoader worker is killed, the
disk refuses the file of the stream's position. Now and then a sample is not finite and is skipped. After each failure
the run goes on from the file that was written last. What it hands out is compared, sample by sample, with a run without
failures in another process: indices, and checksums of images and labels.

Both measure the resident memory of the process in equal windows, and write their result as they go: what has been
measured stays if the run is cut short. Linux only. The last line of the output is the result as JSON.
"""
