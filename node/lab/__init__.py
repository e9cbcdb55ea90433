"""The WAN lab: peers on links of a chosen rate, delay and loss, in network namespaces or containers of one
Linux machine.

shapes      what a link is like                             (values)
shaping     how the kernel is told: htb, netem, NFQUEUE     (commands are pure functions; `Shaper` runs them)
delayer     holds packets back where the kernel cannot      (a program of its own, standard library only)
namespaces  a hub and peers of network namespaces           (`NamespaceLab`)
shape       the same shaping for a container                (`python -m node.lab.shape`)
"""
