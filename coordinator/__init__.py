"""What peers must agree on: who serves what, where to join and whom to send to.

The only room that imports hivemind. Decisions are pure functions; everything that talks is a thin rim around them.
"""
