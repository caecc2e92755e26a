"""The command line ``memo``; nothing else imports it."""
