/* As lastfork_x86_64.S, for aarch64. System calls change x0 only. */
.globl launch
launch:
  mov x9, x0
  ldr x0, [x9]
  mov x1, #0
  ldr x2, [x9, #8]
  mov x3, #0
  mov x4, #0
  mov x8, #220
  svc #0
  cbz x0, child
  ret
child:
  ldr x10, [x9, #16]
  mov x8, #157
  svc #0
  mov w11, #0x10000
  tbnz x0, #63, fail
  ldr x1, [x9, #56]
  cbz x1, filter
  mov x0, #0
  mov x1, #0x540e
  mov x2, #0
  mov x8, #29
  svc #0
  mov w11, #0x20000
  tbnz x0, #63, fail
filter:
  ldr x2, [x9, #40]
  cbz x2, programs
  mov x0, #1
  ldr x1, [x9, #48]
  mov x8, #277
  svc #0
  mov w11, #0x30000
  tbnz x0, #63, fail
programs:
  add x12, x9, #64
  mov w13, #0
next:
  ldr x0, [x12], #8
  cbz x0, out
  ldr x1, [x9, #24]
  ldr x2, [x9, #32]
  mov x8, #221
  svc #0
  neg w0, w0
  cmp w0, #13
  b.eq keep
  cmp w0, #2
  b.eq first
  cmp w0, #20
  b.eq first
  mov w13, w0
  b out
first:
  cbnz w13, next
keep:
  mov w13, w0
  b next
fail:
  neg w0, w0
  orr w13, w0, w11
out:
  str w13, [x10]
  mov x0, #127
  mov x8, #94
  svc #0
  brk #0
