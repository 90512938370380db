"""What every room uses: finished work, processes, tables, errors."""
