"""One model on several GPUs or hosts: a process each, of which rank 0 leads and the others follow.

crew.py     who they are; one TCP connection from each follower to rank 0, which carries the steps
            and, by breaking, the news that a process has died
launch.py   starts the processes of one host, or joins those that torchrun started
follow.py   rank 0 tells each step before it runs it; the others run what they are told
"""
