"""What people look at: pictures, tables and self-contained HTML pages, all made from plain numbers."""
