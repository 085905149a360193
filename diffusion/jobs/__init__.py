"""What all jobs share: what they are told, the process that a rank is, what it says, how it ends, and who writes a folder.

A job is a module with a `JOB`: the type of its spec, and its body. It runs as one process or several, its ranks. As a program a
rank has one argument: the folder that holds the spec, `job.json`. What it has to say goes there: `error.json` if it fails. The
ranks meet in a file of that folder, which is private: nobody else can join them, and none of them listens for strangers while
they find each other. On a cluster (flows/engines) the same bodies run in processes that the cluster starts.
"""
