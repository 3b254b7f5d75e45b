"""The switch from one copy to the other: states, their journals, the order of steps.

It imports engine and below; every step of a migration is written down by it. Read `states`, then
`cutover`.
"""
