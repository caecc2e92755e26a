"""Profile + budgets -> Plan. Never imports torch; the solver is imported only to solve."""
