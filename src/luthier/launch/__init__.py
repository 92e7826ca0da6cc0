"""Many processes and machines: the verb `train` where it takes more than one process, and the commands that start it.

`verb.train` decides whether this process trains or starts others; `agent` starts and watches those of this machine,
over torch's elastic agent; each of them is `worker`, which reads the resolved recipe that `handover` wrote, and nothing
else. `failures` says why they ended. `commands` prints what starts a run elsewhere.
"""
