/* As agent_x86_64.S, for aarch64. x19: operation, w20: errno of the candidates so far, w21: kind. System calls change x0 only. */
.globl _start
_start:
  mov x0, #0x10000000
  mov x1, #0x1000000
  mov x2, #3
  mov x3, #0x12
  mov x4, #3
  mov x5, #0
  mov x8, #222
  svc #0
  mov x1, #0x10000000
  cmp x0, x1
  b.ne die
  ldr x19, [x0]
  mov w20, #0
next:
  ldrb w21, [x19, #56]
  cmp w21, #6
  b.eq candidates
  cmp w21, #7
  b.eq store
  ldr x8, [x19]
  ldp x0, x1, [x19, #8]
  ldp x2, x3, [x19, #24]
  ldp x4, x5, [x19, #40]
  svc #0
  tbnz x0, #63, error
  cmp w21, #4
  b.ne advance
  cbz x0, advance
  ldr x19, [x19, #48]
  b next
store:
  ldp x1, x2, [x19, #8]
  ldr x1, [x1]
  str x2, [x1]
advance:
  add x19, x19, #64
  b next
error:
  neg w0, w0
  cmp w21, #1
  b.eq advance
  cmp w21, #2
  b.ne fail
  ldrb w1, [x19, #57]
  cmp w0, w1
  b.eq advance
fail:
  ldrh w1, [x19, #58]
  mov x9, #0x10000000
  str w1, [x9, #8]
  str w0, [x9, #12]
  mov x0, #4
  add x1, x9, #8
  mov x2, #8
  mov x8, #64
  svc #0
die:
  mov x0, #127
  mov x8, #94
  svc #0
  brk #0
candidates:
  ldr x22, [x19, #8]
  add x23, x22, #24
each:
  ldr x0, [x23], #8
  cbz x0, none
  ldp x1, x2, [x22]
  mov x8, #221
  svc #0
  neg w0, w0
  cmp w0, #13
  b.eq keep
  cmp w0, #2
  b.eq first
  cmp w0, #20
  b.eq first
  mov w20, w0
  b none
first:
  cbnz w20, each
keep:
  mov w20, w0
  b each
none:
  mov w0, w20
  b fail
